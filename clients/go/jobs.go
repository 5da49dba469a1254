package mooring

import (
	"context"
	"io"
	"iter"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"mooring.dev/mooring/mooringv1"
)

// Train starts training an adapter on a subject. What can be known to be wrong is an error here; later failures are
// in the job, which [Client.Wait] and [Client.Watch] follow.
func (c *Client) Train(ctx context.Context, request *mooringv1.TrainRequest) (*mooringv1.Job, error) {
	request = proto.CloneOf(request)
	request.Subject = resourceName("subjects", request.GetSubject())
	request.RequestId = orNewID(request.GetRequestId())
	response, err := unary(ctx, c, c.personalization.Train, request)
	return response.GetJob(), err
}

// Evaluate starts measuring an adapter, or the base alone where request.Adapter is empty. [Client.Evaluation] has
// the figures when the job has succeeded.
func (c *Client) Evaluate(ctx context.Context, request *mooringv1.EvaluateRequest) (*mooringv1.Job, error) {
	request = proto.CloneOf(request)
	request.Adapter = resourceName("adapters", request.GetAdapter())
	request.Subject = resourceName("subjects", request.GetSubject())
	request.RequestId = orNewID(request.GetRequestId())
	response, err := unary(ctx, c, c.personalization.Evaluate, request)
	return response.GetJob(), err
}

// Job returns one job as it is now.
func (c *Client) Job(ctx context.Context, job string) (*mooringv1.Job, error) {
	response, err := unary(ctx, c, c.jobs.GetJob, &mooringv1.GetJobRequest{Name: resourceName("jobs", job)})
	return response.GetJob(), err
}

// Jobs iterates over jobs, newest first; pages are fetched as they are needed. The zero values of kind and state
// are all of them.
func (c *Client) Jobs(
	ctx context.Context, kind mooringv1.JobKind, state mooringv1.JobState,
) iter.Seq2[*mooringv1.Job, error] {
	return pages(func(token string) ([]*mooringv1.Job, string, error) {
		request := &mooringv1.ListJobsRequest{Kind: kind, State: state, PageToken: token}
		page, err := unary(ctx, c, c.jobs.ListJobs, request)
		return page.GetJobs(), page.GetNextPageToken(), err
	})
}

// CancelJob asks a job to stop; a running one stops at its next step.
func (c *Client) CancelJob(ctx context.Context, job string) (*mooringv1.Job, error) {
	response, err := unary(ctx, c, c.jobs.CancelJob, &mooringv1.CancelJobRequest{Name: resourceName("jobs", job)})
	return response.GetJob(), err
}

// Evaluation returns the figures of a succeeded evaluation job.
func (c *Client) Evaluation(ctx context.Context, job string) (*mooringv1.Evaluation, error) {
	request := &mooringv1.GetEvaluationRequest{Name: resourceName("jobs", job)}
	response, err := unary(ctx, c, c.jobs.GetEvaluation, request)
	return response.GetEvaluation(), err
}

// DownloadArtifact writes one of the files that a job made to into; what was written counts only when the error is
// nil.
func (c *Client) DownloadArtifact(ctx context.Context, job, filename string, into io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.jobs.DownloadArtifact(
		ctx, &mooringv1.DownloadArtifactRequest{Name: resourceName("jobs", job), Filename: filename},
	)
	if err != nil {
		return AsError(err)
	}
	return download(
		func() (*mooringv1.FileHeader, []byte, error) {
			message, err := stream.Recv()
			return message.GetFile(), message.GetChunk(), err
		},
		func(*mooringv1.FileHeader) (io.Writer, error) { return into, nil },
	)
}

// Terminal tells whether a job has succeeded, failed or was cancelled.
func Terminal(job *mooringv1.Job) bool {
	switch job.GetState() {
	case mooringv1.JobState_JOB_STATE_SUCCEEDED,
		mooringv1.JobState_JOB_STATE_FAILED,
		mooringv1.JobState_JOB_STATE_CANCELLED:
		return true
	default:
		return false
	}
}

// Watch iterates over a job's events (its progress, its changes of state) with a sequence number larger than
// after, 0 for all, and ends with the job in its terminal state.
//
// A connection that breaks is taken up again after the last event, so that a restart of the server shows as a
// pause: nothing comes twice and nothing is left out. It gives up when the server was silent for the time of
// [WithPatience], and at once where there never was one.
func (c *Client) Watch(
	ctx context.Context, job string, after int64,
) iter.Seq2[*mooringv1.WatchJobResponse, error] {
	return func(yield func(*mooringv1.WatchJobResponse, error) bool) {
		request := &mooringv1.WatchJobRequest{Name: resourceName("jobs", job), AfterSequence: after}
		resume := c.newResume()
		for {
			ended, left, err := c.watchOnce(ctx, request, func(event *mooringv1.WatchJobResponse) bool {
				resume.heard()
				return yield(event, nil)
			})
			if ended || left {
				return
			}
			if err := resume.after(ctx, err); err != nil {
				yield(nil, err)
				return
			}
		}
	}
}

// watchOnce follows one stream and moves request.AfterSequence along. It returns whether the job has ended, whether
// the caller has left, and what else the stream ended with.
func (c *Client) watchOnce(
	ctx context.Context, request *mooringv1.WatchJobRequest, take func(*mooringv1.WatchJobResponse) bool,
) (ended, left bool, _ error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.jobs.WatchJob(ctx, proto.CloneOf(request))
	if err != nil {
		return false, false, AsError(err)
	}
	for {
		event, err := stream.Recv()
		switch {
		case err == io.EOF && ended:
			// Read to its end: cancelling it would look like a lost client to the server.
			return true, false, nil
		case err == io.EOF:
			return false, false, AsError(status.Error(codes.Unavailable, "The stream ended before the job did."))
		case err != nil:
			return ended, false, AsError(err)
		}
		request.AfterSequence = max(request.AfterSequence, event.GetSequence())
		ended = Terminal(event.GetJob())
		if !take(event) {
			return ended, true, nil
		}
	}
}

// Wait follows a job to its end and returns it; onEvent, which may be nil, is called with every event. A job that
// failed or was cancelled is a [*JobError].
func (c *Client) Wait(
	ctx context.Context, job string, onEvent func(*mooringv1.WatchJobResponse),
) (*mooringv1.Job, error) {
	var last *mooringv1.Job
	for event, err := range c.Watch(ctx, job, 0) {
		if err != nil {
			return nil, err
		}
		if onEvent != nil {
			onEvent(event)
		}
		last = event.GetJob()
	}
	if last.GetState() != mooringv1.JobState_JOB_STATE_SUCCEEDED {
		return nil, &JobError{last, FromStatus(last.GetError())}
	}
	return last, nil
}
