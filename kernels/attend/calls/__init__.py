"""One call of the attention kernels over a packed segment: its settings, its buffers, its launches.

settings.py   how many programs, rows and steps
call.py       codes that int8 tensor cores read
in_parts.py   codes in parts: by 16-bit tensor cores, or by int8 ones where they can read them
"""
