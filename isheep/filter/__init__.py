"""Filters: rules on text, ROUGE-L against everything kept so far, and the selection of training pairs."""
