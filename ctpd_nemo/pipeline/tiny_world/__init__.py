"""A generated world in which the whole run works on two CPU cores within minutes.

``tasks`` asks small questions, ``pairs`` makes preference pairs of them, ``tokenizers`` trains two tokenizers of
different algorithms on that text, ``models`` writes an untrained teacher and student, and ``build`` puts all of it in
a folder. It shows that the plumbing works; it says little about methods.
"""
