"""Claims of the papers, tried on data that come with scikit-learn or PyPI: ``make reproduce`` writes the table."""
