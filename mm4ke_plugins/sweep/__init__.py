"""The choice of weight and density without training or merging again (`mm4ke sweep`).

points       a point of the grid, and the row of what was measured of it
measure      the measuring, on one live model
choose       which points are measured, and the rule by which one is picked
output       tables, figures, recipe
"""
