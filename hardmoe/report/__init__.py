"""The report: one self-contained HTML page about a finished run.

Rendering (`render`, `charts`, `templates/`) knows nothing of artifacts: it turns the dictionaries described in `schema`
into a page. Rejected: a page that loads its data or a plotting library at view time; it would need a network or a server,
and could not be mailed to a colleague or opened in ten years.
"""
