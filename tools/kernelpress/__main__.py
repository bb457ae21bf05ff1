"""``python -m kernelpress``: the same as the ``kernelpress`` command."""

from kernelpress.cli import main

if __name__ == "__main__":
    main()
