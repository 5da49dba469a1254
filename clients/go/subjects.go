package mooring

import (
	"context"
	"iter"

	"google.golang.org/protobuf/proto"

	"mooring.dev/mooring/mooringv1"
)

// CreateSubject creates a subject without photos: a class noun, a declaration of rights, and an id.
func (c *Client) CreateSubject(
	ctx context.Context, request *mooringv1.CreateSubjectRequest,
) (*mooringv1.Subject, error) {
	request = proto.CloneOf(request)
	request.RequestId = orNewID(request.GetRequestId())
	response, err := unary(ctx, c, c.subjects.CreateSubject, request)
	return response.GetSubject(), err
}

// UploadPhotos adds photos to a subject, all or none; what it already has is not stored twice, so that a broken
// upload is simply repeated. A bad photo is a field violation "files[i]" of the [*Error].
func (c *Client) UploadPhotos(
	ctx context.Context, subject string, photos ...File,
) (*mooringv1.UploadPhotosResponse, error) {
	return upload(
		ctx, c.subjects.UploadPhotos, photos,
		&mooringv1.UploadPhotosRequest{
			Content: &mooringv1.UploadPhotosRequest_Subject{Subject: resourceName("subjects", subject)},
		},
		func(header *mooringv1.FileHeader) *mooringv1.UploadPhotosRequest {
			return &mooringv1.UploadPhotosRequest{Content: &mooringv1.UploadPhotosRequest_File{File: header}}
		},
		func(data []byte) *mooringv1.UploadPhotosRequest {
			return &mooringv1.UploadPhotosRequest{Content: &mooringv1.UploadPhotosRequest_Chunk{Chunk: data}}
		},
	)
}

// Subject returns one subject with its photos' descriptions.
func (c *Client) Subject(ctx context.Context, subject string) (*mooringv1.Subject, error) {
	request := &mooringv1.GetSubjectRequest{Name: resourceName("subjects", subject)}
	response, err := unary(ctx, c, c.subjects.GetSubject, request)
	return response.GetSubject(), err
}

// Subjects iterates over all subjects, newest first; pages are fetched as they are needed.
func (c *Client) Subjects(ctx context.Context) iter.Seq2[*mooringv1.Subject, error] {
	return pages(func(token string) ([]*mooringv1.Subject, string, error) {
		request := &mooringv1.ListSubjectsRequest{PageToken: token}
		page, err := unary(ctx, c, c.subjects.ListSubjects, request)
		return page.GetSubjects(), page.GetNextPageToken(), err
	})
}

// DeleteSubject deletes a subject and its photos; adapters that were trained on it stay.
func (c *Client) DeleteSubject(ctx context.Context, subject string) error {
	request := &mooringv1.DeleteSubjectRequest{Name: resourceName("subjects", subject)}
	_, err := unary(ctx, c, c.subjects.DeleteSubject, request)
	return err
}
