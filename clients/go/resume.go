package mooring

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
)

// resume counts the tries of one stream that is taken up again where it broke.
//
// A stream that never brought anything fails at once (gRPC has repeated it already); one that was running goes on for
// the client's patience, long enough for a server to restart and load its base model.
type resume struct {
	patience time.Duration
	last     time.Time
	started  bool
	failures int
}

func (c *Client) newResume() *resume { return &resume{patience: c.patience, last: time.Now()} }

// heard notes that something came.
func (r *resume) heard() { r.last, r.started, r.failures = time.Now(), true, 0 }

// after waits before the next try: from 0.2 s to 3 s, and at least what the server asked for. It returns an error
// where another try is not worth it, or the context has ended.
func (r *resume) after(ctx context.Context, err error) error {
	var failure *Error
	if !errors.As(err, &failure) || failure.Code != codes.Unavailable || !r.started ||
		time.Since(r.last) > r.patience {
		return err
	}
	r.failures++
	delay := max(min(100*time.Millisecond<<min(r.failures, 5), 3*time.Second), failure.RetryAfter)
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return AsError(ctx.Err())
	case <-timer.C:
		return nil
	}
}
