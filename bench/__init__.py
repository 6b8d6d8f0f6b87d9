"""What is measured, a room for each kind of question; figures and tables are in bench/results."""
