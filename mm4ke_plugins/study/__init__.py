"""Many edits side by side: one table of (facts, method, seed), made by the hosts' own commands (`mm4ke study`).

plan.py     what a study's file says
steps.py    the commands behind a row, and where their results are kept
run.py      all rows, one after the other
table.py    what was found, as numbers: means, intervals, fronts
page.py     the same as one page
"""
