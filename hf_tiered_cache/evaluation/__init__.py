"""Does the cache change what a model says, and what does it cost: measured on anybody's model.

The commands of the package and the scripts in `eval/` share what is here. Nothing of the cache
knows this room, and importing the package does not import it.
"""
