package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// As `aws s3 cp` has them.
const (
	partSize    = 8 << 20 // bytes
	partsAtOnce = 10
)

// upload stands for `aws s3 cp - s3://…`: one object, in parts as they come.
func upload(ctx context.Context, in io.Reader, p places) error {
	client, err := p.client()
	if err != nil {
		return err
	}
	name := "log.gz"
	begun, err := client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{
		Bucket: new(bucket), Key: &name, ServerSideEncryption: types.ServerSideEncryptionAwsKms, SSEKMSKeyId: &p.Key,
	})
	if err != nil {
		return err
	}
	var mu sync.Mutex // of errs, and of the elements of parts
	var errs []error
	parts := map[int32]types.CompletedPart{}
	room := make(chan struct{}, partsAtOnce)
	var wg sync.WaitGroup
	last := int32(0)
	for more := true; more; {
		room <- struct{}{}
		var data bytes.Buffer
		n, err := io.CopyN(&data, in, partSize)
		if more = err == nil; err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == 0 && last > 0 {
			break
		}
		last++
		number := last
		wg.Go(func() {
			defer func() { <-room }()
			out, err := client.UploadPart(ctx, &s3.UploadPartInput{
				Bucket: new(bucket), Key: &name, UploadId: begun.UploadId, PartNumber: &number, Body: bytes.NewReader(data.Bytes()),
			})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
				return
			}
			parts[number] = types.CompletedPart{PartNumber: &number, ETag: out.ETag, ChecksumCRC32: out.ChecksumCRC32}
		})
	}
	wg.Wait()
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	inOrder := make([]types.CompletedPart, last)
	for number, part := range parts {
		inOrder[number-1] = part
	}
	_, err = client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
		Bucket: new(bucket), Key: &name, UploadId: begun.UploadId, MultipartUpload: &types.CompletedMultipartUpload{Parts: inOrder},
	})
	return err
}
