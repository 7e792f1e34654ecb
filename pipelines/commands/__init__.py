"""What the commands of `quantpress` do; `quantpress/cli.py` has their options.

loading.py   the model and the texts that commands are given
evaluate.py  eval: quality against controls, with tables and pictures
pack.py      pack: read a text, save the context
run.py       run: answer questions about a text, or about a saved context
"""
