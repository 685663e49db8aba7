"""What a run's numbers look like to people: tables, figures and one self-contained page."""
