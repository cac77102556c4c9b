"""`python -m pixtral_cli` is `pixtral`."""

from pixtral_cli.main import main

main()
