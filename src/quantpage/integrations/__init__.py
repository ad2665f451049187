"""Other people's engines over our pages. Only here are they imported at module level."""
