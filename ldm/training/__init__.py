"""One loop for every stage; a task is the models and the losses."""
