"""`mm4ke report`: what an edit taught, and what it cost, from the run folders of lm-eval and of `mm4ke easyedit`.

runs.py         run folders -> columns of scored questions
statistics.py   means as EasyEdit takes them, paired differences, intervals, McNemar's test
summary.py      columns -> the rows, differences, warnings and changed answers that a report shows
verdict.py      the same in sentences
figures.py      the radar and the plot of differences, as SVG
page.py         report.html and report.md
"""
