// Train-and-generate teaches a subject from photos, follows the training, and draws the subject.
//
//	export MOORING_API_KEY=moor_…
//	go run ./examples/train-and-generate -server mooring.example:443 -id rex -class dog photos/*.jpg
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"

	"google.golang.org/protobuf/proto"

	"mooring.dev/mooring"
	"mooring.dev/mooring/mooringv1"
)

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	server := flag.String("server", "localhost:50051", "address of the server")
	id := flag.String("id", "rex", "id of the subject and its adapter")
	class := flag.String("class", "dog", "what the subject is an instance of")
	steps := flag.Int("steps", 400, "training steps")
	out := flag.String("out", ".", "folder to write to")
	flag.Parse()

	client, err := mooring.New(*server, mooring.WithEnvironment())
	if err != nil {
		return err
	}
	defer client.Close()

	subject, err := client.CreateSubject(ctx, &mooringv1.CreateSubjectRequest{
		SubjectId: *id,
		Subject: &mooringv1.Subject{
			ClassNoun: *class,
			Rights:    &mooringv1.RightsDeclaration{Basis: mooringv1.RightsDeclaration_BASIS_OWNED},
		},
	})
	if err != nil {
		return err
	}
	var photos []mooring.File
	for _, path := range flag.Args() {
		photos = append(photos, mooring.FileAt(path))
	}
	if _, err := client.UploadPhotos(ctx, subject.GetName(), photos...); err != nil {
		return err
	}

	job, err := client.Train(ctx, &mooringv1.TrainRequest{
		Subject: subject.GetName(),
		Config: &mooringv1.TrainingConfig{
			Strength: &mooringv1.TrainingConfig_Preset{Preset: mooringv1.DriftPreset_DRIFT_PRESET_BALANCED},
			Steps:    proto.Int32(int32(*steps)),
		},
	})
	if err != nil {
		return err
	}
	// Wait goes on by itself when the server is restarted; a job that fails is a *mooring.JobError.
	job, err = client.Wait(ctx, job.GetName(), func(event *mooringv1.WatchJobResponse) {
		if progress := event.GetProgress(); progress.GetTraining() != nil {
			log.Printf("step %d of %d, drift %.3f of %.3f", progress.GetStep(), progress.GetSteps(),
				progress.GetTraining().GetDrift(), progress.GetTraining().GetDriftBudget())
		}
	})
	if err != nil {
		return err
	}

	images, err := client.Images(ctx, &mooringv1.GenerateRequest{
		Prompt:  fmt.Sprintf("a photo of a %s %s on the beach", subject.GetPlaceholder(), *class),
		Adapter: job.GetAdapter(),
	})
	if err != nil {
		return err
	}
	path := *out + "/" + *id + ".png"
	if err := images[0].WriteFile(path); err != nil {
		return err
	}
	fmt.Println(path)
	return nil
}
