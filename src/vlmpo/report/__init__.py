"""The report of runs: one HTML file to look at and a picture of the main curves, made from run folders alone.

The data flow one way: files of a run (``files``, ``kept``) -> what is shown (``content``) -> HTML (``page``) and PNG
(``picture``). Nothing here needs torch.
"""
