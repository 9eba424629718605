"""What an operator's work is: columns of a batch to terms whose prices a fit finds; `terms.py` begins."""
