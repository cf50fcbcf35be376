"""What turns requests into steps, and results into tokens and text.

Requests come in at any time; the scheduler batches their tokens into steps, the loop runs these on
whatever pipeline it is given, and each request hears its tokens as they come. The only room that
sees both text and token ids; called by gateway and commands.
"""
