package agent

// Status is the report for programs, in the form of the status file; err is what stopped the run as a whole.
func (r Report) Status(err error) Status { return newStatus(r, err) }
