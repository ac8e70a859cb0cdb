"""What commands and Dask's workers do alike with many images: find them, compute a result for each, draw maps.

found.py     the files that a user names          results.py   what a model says of each of them, read ahead
maps.py      label maps and what is drawn of them  marks.py     which model made the maps in a folder
"""
