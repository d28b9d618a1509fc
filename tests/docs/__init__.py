"""What the pages say is done as they say it.

Every block of README.md, docs/ and the READMEs of configs/ is run in a copy of the
repository (``sandbox.py``): Python at once, commands in the slow tests. The others look
at what every command is given, and at the names that stand in the text.
"""
