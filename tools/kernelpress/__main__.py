"""``python -m kernelpress``: the same as the ``kernelpress`` command."""

from kernelpress.cli.main import main

if __name__ == "__main__":
    main()
