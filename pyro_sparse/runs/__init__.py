"""What the command line does: settings, one run, comparisons, analysis, pages, terminal output.

`settings` says what a run is, `zoo` which models there are, `experiment` trains one and reads it
back, `comparison` trains several, `analysis` and `deployment` say more of them and ship them;
`table` holds the numbers that `terminal` prints and `page` writes, `cli` is the command.
"""
