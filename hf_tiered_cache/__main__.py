"""`python -m hf_tiered_cache`: the command line, where no script was installed."""

from hf_tiered_cache.commands.app import main

if __name__ == "__main__":
    main()
