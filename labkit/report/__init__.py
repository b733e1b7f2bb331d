"""Tables, figures, widgets, executing notebooks, and the site."""
