"""Attention to packed tokens whose codes lie in parts, or have levels that are no bytes: see `PartOperands`.

operands.py   which codes are read in this way
launches.py   launches the three kernels
queries.py    the first: queries into code space
split.py      the second: all packed tokens, on 16-bit tensor cores
levels.py     what it makes of packed words
windows.py    the same where a level is chosen by codes of several channels
merge.py      the last: partial sums become the output
groups.py     which of these codes the int8 kernel reads instead, and with what
"""
