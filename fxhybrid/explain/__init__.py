"""What a plan does, in terms of the user's own model: tables, pictures and a page."""
