def write(settings, results): pass
