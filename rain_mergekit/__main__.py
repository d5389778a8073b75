"""`python -m rain_mergekit`: the command line, also for torchrun."""

from rain_mergekit.cli import main

if __name__ == "__main__":
    main()
