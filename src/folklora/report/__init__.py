"""Tables, pictures and the HTML page of a run, from its run directory alone.

- `records`, `reading`: a run directory, or a folder of compared runs, as typed data; errors name file and line.
- `tables`: the comparison over seeds, as Markdown and for the terminal.
- `figures`, `figures_compare`: one function a figure, in one `style`.
- `page`: `write_report` and `write_compare_report`, one self-contained HTML file each.
- `audit`: what left each client, what attacks recovered, what was promised and what is not protected, as ``audit.html``
  and ``audit.json``; its `facts`, the `inventory`, `attacked`, the `protections`, and the rules of `findings`.

Nothing here trains or loads a model: a report can be written on a machine that holds only the folder. Only the audit
knows methods, and asks them for names and shapes alone.
"""
