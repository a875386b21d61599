"""The command line `hf-tiered-cache`: a user's own machine and model, measured and checked.

One file per command, which says what it takes and prints; what is measured is in `evaluation`.
"""
