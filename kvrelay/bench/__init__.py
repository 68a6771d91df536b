"""`kvrelay bench`: a load generator for a running cluster, what it measures, and its reports.

`lengths` and `traces` say what is asked (`Shape`), `workload` makes prompts of it (`Job`), `arrivals` says when, `load`
sends it and notes when each token came (`Record`), `measure` sums up (`Summary`), and `report`, `report_text` and
`report_html` tell. `settings` are the command's `flags`, parsed, and `runner` is one benchmark from end to end.
"""
