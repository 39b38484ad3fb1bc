"""Everything in one run: tables, cascades, costs, attacks and the report."""
