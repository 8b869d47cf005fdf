"""`python -m clipkit`, which torchrun can launch."""

from clipkit.cli import main

main()
