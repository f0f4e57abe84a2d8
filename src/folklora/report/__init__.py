"""Tables, pictures and the HTML page of a run, from its run directory alone.

- `records`, `reading`: a run directory, or a folder of compared runs, as typed data; errors name file and line.
- `tables`: the comparison over seeds, as Markdown and for the terminal.
- `figures`, `figures_compare`: one function a figure, in one `style`.
- `page`: `write_report` and `write_compare_report`, one self-contained HTML file each.

Nothing here trains, loads a model or knows a method: a report can be written on a machine that holds only the folder.
"""
