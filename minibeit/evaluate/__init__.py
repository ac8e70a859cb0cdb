"""Models measured on labelled data: what is there to be measured, the measuring, and a report of it."""
