"""Where stages run, and who starts them again.

The orchestrator asks where a stage is and tells of its loss; what places it (a supervisor of local
processes, or whoever started it by hand) sees neither a key nor an activation. For engines that
others run, `rendered` writes down what those take.
"""
