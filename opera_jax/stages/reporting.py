def write(run, config): pass
