"""Readers of what others wrote, under input that is meant to break them.

`tests/test_fuzz.py` runs some cases of each with the suite, `python -m tests.fuzz` any number.
"""
