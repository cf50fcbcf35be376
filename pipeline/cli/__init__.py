"""The console commands.

A command line comes in; it is checked whole before anything starts, and the parts it names are
made and handed to each other. Every failure leaves as one line and an exit code.
"""
