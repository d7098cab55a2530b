"""``python -m benchmarks.reliability``: see `runner`."""

from benchmarks.reliability.runner import main

if __name__ == "__main__":
    main()
