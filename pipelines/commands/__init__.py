"""What the commands of `quantpress` do; `quantpress/cli/` has their options.

Each module has a `main`, which returns an `Outcome`: what to print, as a table and as JSON, and the exit
status.

loading.py    the model and the texts that commands are given
output.py     one JSON document or a table; progress on stderr
run.py        run: answer questions about a text, or about a saved context
pack.py       pack: read a text, save the context
compare.py    compare: the same questions over several caches
memory.py     memory: what a cache will weigh, what fits a GPU
evaluate.py   eval: quality against controls, with tables and pictures
bench.py      bench: tokens a second, time to first token, peak memory
inspect.py    inspect: a model's layers and keys, a setting for it
validate.py   validate: the codec beside theory
"""
