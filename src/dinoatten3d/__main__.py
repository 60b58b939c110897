"""`python -m dinoatten3d`."""

from dinoatten3d.cli import main

main()
