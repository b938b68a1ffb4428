"""What a run has learned and what to mend first: figures, errors, and a page that shows them."""
