// Package mooring is the client of the Mooring personalisation service.
//
// It teaches a resident text-to-image model a subject from a few photos, draws it, and watches the work:
//
//	client, err := mooring.New("mooring.example:443", mooring.WithAPIKey(key))
//	if err != nil {
//		return err
//	}
//	defer client.Close()
//
//	images, err := client.Images(ctx, &mooringv1.GenerateRequest{Prompt: "a photo of <rex>", Adapter: "rex"})
//
// # Requests and names
//
// Requests are the messages of package mooringv1; they are not changed. What is left unset takes the server's
// default. Where a subject, adapter or job is named, its id will do: "rex" is tenants/-/subjects/rex, and "-" is
// the caller's own tenant. Creating calls get a request id when they have none, so that repeating them is safe.
//
// # Connection
//
// [New] speaks TLS unless [WithInsecure] allows plain text, which it does to loopback addresses only. A call that
// fails with UNAVAILABLE is repeated up to four times with growing pauses, or after the pause that the server asks
// for; nothing else is repeated. A stream is repeated until its first message only: what was begun is not done
// twice behind the caller's back. [Client.Watch] goes on by itself where it was, over a restart of the server too.
//
// Short calls have a deadline of 30 s unless their context has one ([WithTimeout]). Streams and uploads have that
// of their context alone.
//
// # Streams
//
// Streams are iterators (iter.Seq2) of an event and an error; the error, if any, comes last. Leaving the loop
// cancels the call, and the server stops the work at its next step.
//
// # Errors
//
// Whatever a call fails with on the server's side is an [*Error] with a reason that programs can act on:
//
//	var failure *mooring.Error
//	if errors.As(err, &failure) && failure.RetryAfter > 0 {
//		time.Sleep(failure.RetryAfter)
//	}
//
// A job that ends without success is a [*JobError] of [Client.Wait].
package mooring
