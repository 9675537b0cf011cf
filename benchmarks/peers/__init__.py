"""Other solvers on the accuracy benchmark's questions: one file each, each run in a process of its own."""
