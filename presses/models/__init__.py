"""What presses ask of a model, and how they leave it.

attention.py      where a model's attention is, and which layers a press works on
scanning.py       scans of all modules, once while a context is read
eligibility.py    which models can be read, evicted from and packed, and every reason why not
full_layers.py    hybrid models, as presses of kvpress see them
filling.py        a model must fill its cache, or an error says why
old_names.py      what hooks of kvpress read, on versions of transformers that no longer pass it
positions.py      how many positions a model was made for
lock.py           one thread at a time on a model
restore.py        a model left as it was found
"""
