"""The command line `hf-tiered-cache`: a user's own machine and model, measured and checked.

One file per command, which says what it takes and prints; what is measured is in `evaluation`.
torch and transformers take seconds to load: a command imports what needs them in its function, once
its arguments are right, so that help and mistakes are answered at once.
"""
