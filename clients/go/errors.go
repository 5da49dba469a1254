package mooring

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"mooring.dev/mooring/mooringv1"
)

// Error is what a call, a job or a request of a batch failed with. Find it with [errors.As].
//
// [errors.Is] with [context.Canceled] and [context.DeadlineExceeded] holds for the codes of the same name, and
// gRPC's status.Code and status.FromError take it as what it came from.
type Error struct {
	// Code is the canonical status code.
	Code codes.Code
	// Reason is the cause for programs: a name of [mooringv1.ErrorReason] without its prefix, such as "QUEUE_FULL".
	// Empty where something else than a Mooring server answered. See [Error.Has].
	Reason string
	// Message says what is wrong, for people.
	Message string
	// Remedy says what to do about it; it may be empty.
	Remedy string
	// Fields are the faulty fields of the request.
	Fields []FieldViolation
	// Metadata are short strings that belong to the reason, such as "limit", "expected" and "found".
	Metadata map[string]string
	// RetryAfter is when the server invites another try; 0 where it does not say.
	RetryAfter time.Duration
	// RequestID is the call's id in the server's log; it may be empty.
	RequestID string

	status *status.Status
}

// FieldViolation is one field of a request and what is wrong with it.
type FieldViolation struct {
	// Field is its path, such as "config.steps" or "files[3]".
	Field string
	// Description says what is wrong.
	Description string
}

// Error returns reason, message and remedy in one line.
func (e *Error) Error() string {
	label := e.Reason
	if label == "" {
		label = e.Code.String()
	}
	return strings.TrimSpace(fmt.Sprintf("mooring: %s: %s %s", label, e.Message, e.Remedy))
}

// Has tells whether the error has this reason.
func (e *Error) Has(reason mooringv1.ErrorReason) bool {
	return e.Reason != "" && e.Reason == strings.TrimPrefix(reason.String(), "ERROR_REASON_")
}

// Is makes errors.Is work for the errors of package context.
func (e *Error) Is(target error) bool {
	return target == context.Canceled && e.Code == codes.Canceled ||
		target == context.DeadlineExceeded && e.Code == codes.DeadlineExceeded
}

// GRPCStatus returns the status that the error was made from.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// Has tells whether err is, or wraps, an [*Error] of this reason.
func Has(err error, reason mooringv1.ErrorReason) bool {
	var failure *Error
	return errors.As(err, &failure) && failure.Has(reason)
}

// JobError says that a job ended without success. It wraps the job's [*Error].
type JobError struct {
	// Job is the job in its terminal state.
	Job *mooringv1.Job
	// Err is why it failed or was cancelled.
	Err *Error
}

// Error names the job and its error.
func (e *JobError) Error() string {
	state := strings.ToLower(strings.TrimPrefix(e.Job.GetState().String(), "JOB_STATE_"))
	return fmt.Sprintf("mooring: job %s %s: %s", e.Job.GetName(), state, strings.TrimPrefix(e.Err.Error(), "mooring: "))
}

// Unwrap returns the job's error.
func (e *JobError) Unwrap() error { return e.Err }

// AsError turns an error of gRPC's, or of package context, into an [*Error]; nil and all others stay as they are.
func AsError(err error) error {
	var failure *Error
	if err == nil || errors.As(err, &failure) {
		return err
	}
	if s, ok := status.FromError(err); ok {
		return fromStatus(s)
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fromStatus(status.FromContextError(err))
	}
	return err
}

// FromStatus reads a status inside a message, such as that of a failed job.
func FromStatus(s *statuspb.Status) *Error { return fromStatus(status.FromProto(s)) }

func fromStatus(s *status.Status) *Error {
	failure := &Error{Code: s.Code(), Message: s.Message(), status: s}
	for _, detail := range s.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			failure.Reason = strings.TrimPrefix(detail.GetReason(), "ERROR_REASON_")
			failure.Metadata = maps.Clone(detail.GetMetadata())
			failure.Remedy, failure.RequestID = failure.Metadata["remedy"], failure.Metadata["request_id"]
			delete(failure.Metadata, "remedy")
			delete(failure.Metadata, "request_id")
		case *errdetails.BadRequest:
			for _, violation := range detail.GetFieldViolations() {
				failure.Fields = append(
					failure.Fields, FieldViolation{violation.GetField(), violation.GetDescription()},
				)
			}
		case *errdetails.RetryInfo:
			failure.RetryAfter = detail.GetRetryDelay().AsDuration()
		}
	}
	// The status line says message and remedy; here they are apart.
	if message, found := strings.CutSuffix(failure.Message, failure.Remedy); found && message != "" {
		failure.Message = strings.TrimSpace(message)
	}
	return failure
}
