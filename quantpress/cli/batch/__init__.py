"""`quantpress batch`: the same questions about many documents.

command.py       the command
documents.py     the files of a folder, one after the other
answers_file.py  a line for each answered document, written once
worker.py        a model that answers one document after the other
on_ray.py        many such workers on a Ray cluster
"""
